"""What tests need in order to look at GPU code on machines without a GPU."""
