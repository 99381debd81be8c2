"""The bank: what it holds, what a batch brings to it, its state."""
