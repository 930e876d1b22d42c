"""FID, sFID, Inception Score, precision and recall: the Inception network, sets of images, FID during training."""
