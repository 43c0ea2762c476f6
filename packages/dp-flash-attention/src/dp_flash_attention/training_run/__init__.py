"""``dpfa train``: public weights, private fine-tuning, a run folder that states what was promised."""
