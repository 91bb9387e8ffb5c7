"""Foreign weights in. No torch; each foreign layout is one table of rules."""
