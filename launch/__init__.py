"""Commands that train and measure with the fused loss."""
