"""From a base model to one that answers: data of conversations and preferences, and the jobs that train on them."""
