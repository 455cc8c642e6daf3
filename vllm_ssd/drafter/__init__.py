"""The drafter: a draft model, a token tree per request, and the loop that serves them."""
