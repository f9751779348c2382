"""A frozen linear layer with its adapter, and its products; linears of one input are one group."""
