"""Acting while the policy computes."""
