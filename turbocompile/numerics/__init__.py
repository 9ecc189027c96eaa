"""What a rewrite costs in accuracy: the verifier, calibration, smoothing, the comparison with the module itself."""
