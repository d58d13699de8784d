import re


def last_number(completion, answer, row):
    n = re.findall(r"-?\d[\d,]*", completion)
    return bool(n) and n[-1].replace(",", "") == answer


def partial(completion, answer, row):
    return 0.5
