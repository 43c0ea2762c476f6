"""The verifier's own truths: nothing here imports a mechanism, an accountant or a backend."""
