"""Training data: image folders and digits, the order of the data, the frozen autoencoder, stored latents."""
