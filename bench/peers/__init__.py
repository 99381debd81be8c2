"""What stands beside pico_fast in a measurement: the usual ways to the same results, written plainly."""
