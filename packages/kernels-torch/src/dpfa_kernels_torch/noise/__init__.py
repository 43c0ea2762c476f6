"""From a key and coordinates to noise: counter map, generator, transform."""
