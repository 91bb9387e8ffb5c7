"""What a policy learned, seen without a robot or a simulator: measured on held-out episodes, said in sentences.

frames      episodes and moments at which a chunk is asked for, and what was demonstrated from there
ablations   observations from which one thing was taken: the instruction, a camera, the state
measure     chunks beside demonstrations → figures; numpy alone
inside      what the network has inside: features of pictures, attention
findings    figures → sentences, with all thresholds
page        one HTML file
"""
