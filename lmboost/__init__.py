"""lmboost: pretraining in which language models help each other to be trained."""
