"""What the library costs, and what its kernels take: see README.md beside this file."""
