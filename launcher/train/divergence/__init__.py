"""What happens when a loss, a gradient or a weight is not finite: the training ends, and says where it began."""
