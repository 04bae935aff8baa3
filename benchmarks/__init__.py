"""Speed and accuracy of our optimizers beside their peers, each table timed in one run."""
