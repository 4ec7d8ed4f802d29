"""From a checkpoint to a bundle: the stages in order."""
