"""These tests run in environments of their own: make test-integrations."""

import os
import sys
from pathlib import Path

# nothing here asks for weights or data, and nothing may try to fetch them
os.environ["HF_HUB_OFFLINE"] = "1"

# transformers tries to import a package called kernels; the project's folder of that name refuses
ROOT = Path(__file__).parents[2]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
