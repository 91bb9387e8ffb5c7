"""Networks: linen modules with logical axis names. No mesh, no loss, no time distribution."""
