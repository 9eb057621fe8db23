"""A model's answers to questions: from its weights, on any number of processes, or through an endpoint."""

from .endpoint import answers_from_endpoint as answers_from_endpoint
from .endpoint import require_answers as require_answers
from .launch import join_launch as join_launch
from .launch import load_student as load_student
from .local import generate_answers as generate_answers
