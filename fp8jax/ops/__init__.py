"""What layers call: one family of operations a file, each with the choice of what runs it.

choice        which implementation, resolved once a trace; decisions: told to who wants to know
values        what operations hand to each other: QActivation, PartialSums, Stream
matmul        products with weights, and the quantization of what they multiply
norm          RMSNorm of the residual stream
attention     over fresh tokens or the cache
activation    the gated activation of an MLP
experts       routing, and products with stacks of experts
gradients     how a derivative gets past the codes
"""
