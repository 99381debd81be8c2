"""Selection: which keys each anchor is compared with."""
