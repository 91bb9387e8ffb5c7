"""Without the optional extra (`pip install -e '.[sim]'`) only the tests of plain numpy code are collected."""

import importlib.util

if not all(importlib.util.find_spec(name) for name in ("gymnasium", "mujoco")):
    collect_ignore = ["test_expert.py", "test_gym.py", "test_record.py", "test_single.py", "test_tabletop.py"]
