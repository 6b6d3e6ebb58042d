"""How the bundled model was made: data set, autoencoder, text encoder and UNet, export, evaluation (see README.md)."""
