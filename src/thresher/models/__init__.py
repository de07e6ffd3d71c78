"""From a model's name to a module that runs on our kernels: resolve, load, fuse."""
