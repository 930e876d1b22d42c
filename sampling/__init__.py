"""From a checkpoint to images: the pipeline that every command draws with, and the noise of each image."""
