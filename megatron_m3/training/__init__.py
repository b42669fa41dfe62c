"""Training: set-up, step, loop, schedule, divergence guard, metrics, and the state that resumes a run."""
