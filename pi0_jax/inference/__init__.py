"""Running a policy: from a checkpoint and raw observations to raw actions."""
