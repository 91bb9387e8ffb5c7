"""From a dataset on disk to `Batch`: numpy until the last step, without torch or tensorflow."""
