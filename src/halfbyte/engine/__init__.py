"""Forward and backward over a decoder, layer by layer, within the memory there is."""
