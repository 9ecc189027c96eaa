"""Commands that look at engines and machines: bench, doctor, verify."""
