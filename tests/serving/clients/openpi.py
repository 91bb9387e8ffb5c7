"""Drives a server with openpi's client and saves what came back: python openpi.py URI REQUESTS.npz ANSWERS.npy

Its interpreter has `openpi-client` and numpy, and nothing of ours.
"""

import json
import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

uri, requests, answers = sys.argv[1:]
with np.load(requests) as file:
    columns = dict(file)
client = WebsocketClientPolicy(uri)
chunks = []
for i in range(len(columns["prompt"])):
    observation = {name: column[i] for name, column in columns.items() if name != "prompt"}
    answer = client.infer(observation | {"prompt": str(columns["prompt"][i])})
    chunks.append(answer["actions"])
client.reset()
np.save(answers, np.stack(chunks))
result = {"metadata": client.get_server_metadata(), "timing": sorted(answer["server_timing"])}
try:
    client.infer({"prompt": "nothing else"})
except RuntimeError as error:
    result["error"] = str(error)
print(json.dumps(result))
