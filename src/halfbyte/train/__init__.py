"""Training: the configuration, the layer engine, the step, the loop, and evaluation."""
