import sys
from pathlib import Path

# importmode=importlib leaves the folder of the tests off the path
sys.path.insert(0, str(Path(__file__).parent))
