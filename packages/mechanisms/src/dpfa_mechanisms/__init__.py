"""How much noise a release needs: sensitivities, mechanisms and the cost of a sampler's tail."""

__version__ = "0.1.0"
