"""Quality at equal bits: a1q and its peers on one teacher, one calibration set, the same tokens and seeds."""
