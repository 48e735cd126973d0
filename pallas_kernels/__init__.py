"""The numeric operations, one a file: a plain-jnp reference beside the Pallas-Triton kernel.
Imported as `fp8jax.pallas_kernels`."""
