"""Sixty prompts of three kinds for a real model: questions, programs to complete, sums in words."""

from __future__ import annotations

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three healthy breakfasts.",
    "Translate to Spanish: The library opens at nine.",
    "Who wrote Romeo and Juliet, and when was it first performed?",
    "Give me a short recipe for pancakes.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the water cycle for a child.",
    "Name the planets of the solar system in order from the sun.",
    "How do I politely decline an invitation to a party?",
    "What does the command `ls -la` do on Linux?",
    "Suggest a title for a story about a lighthouse keeper and a lost whale.",
    "What are the primary colours, and what do you get when you mix two of them?",
    "Write an e-mail asking a colleague to move tomorrow's meeting from ten to eleven.",
    "Why do leaves change their colour in autumn?",
    "Is it better to learn to play the piano or the guitar first? Give one reason for each.",
    "Describe a busy street market in the morning. Use all five senses.",
    "What happened in Berlin on the ninth of November 1989?",
    "Wie heißt die Hauptstadt von Österreich?",
]

PROGRAMS = [
    f'Complete the code I provided.\n\n{signature}\n    """{text}\n    """\n'
    for signature, text in [
        ("def is_palindrome(text: str) -> bool:", "Whether text reads the same backwards."),
        (
            "def gcd(a: int, b: int) -> int:",
            "Greatest common divisor of two positive integers.\n    >>> gcd(12, 18)\n    6",
        ),
        (
            "def count_vowels(word):",
            "Count the letters a, e, i, o and u.\n    >>> count_vowels('banana')\n    3",
        ),
        ("def flatten(lists: list) -> list:", "Put the elements of all inner lists into one list, in order."),
        ("def fibonacci(n: int) -> int:", "Return the n-th Fibonacci number; the first two are 0 and 1."),
        (
            "def second_largest(numbers):",
            "Return the second largest distinct number, or None if there is none.",
        ),
        (
            "def celsius(fahrenheit: float) -> float:",
            "Convert a temperature.\n    >>> celsius(212)\n    100.0",
        ),
        ("def merge(left: list, right: list) -> list:", "Merge two sorted lists into one sorted list."),
        ("def word_counts(text: str) -> dict:", "Map every lower-cased word to how often it occurs."),
        ("def is_prime(n):", "Whether n is a prime number.\n    >>> is_prime(7)\n    True"),
        ("def rotate(values: list, steps: int) -> list:", "Move every element so many places to the right."),
        ("def binary(n: int) -> str:", "Write an integer in base 2.\n    >>> binary(5)\n    '101'"),
        (
            "def remove_duplicates(items):",
            "Keep the first of equal items.\n    >>> remove_duplicates([1, 2, 1])\n    [1, 2]",
        ),
        ("def longest_word(sentence: str) -> str:", "Return the longest word; of several, the first."),
        (
            "def matrix_sum(rows: list[list[int]]) -> int:",
            "Add up all entries of a matrix given as a list of rows.",
        ),
        ("def caesar(text: str, shift: int) -> str:", "Shift every letter in the alphabet."),
        ("def below(limit: int, values: list) -> bool:", "Return True if all values are below the limit."),
        (
            "def initials(name: str) -> str:",
            "The first letter of each part.\n    >>> initials('Ada Lovelace')\n    'A.L.'",
        ),
        (
            "def parse_time(text):",
            "Turn 'hh:mm' into minutes since midnight.\n    >>> parse_time('01:30')\n    90",
        ),
        (
            "def transpose(rows):",
            "Swap rows and columns.\n    >>> transpose([[1, 2], [3, 4]])\n    [[1, 3], [2, 4]]",
        ),
    ]
]

SUMS = [
    "Anna has 12 apples. She gives 5 to her brother and buys 8 more. How many apples does she have now?",
    "A train travels 60 miles in one hour. How far does it travel in three and a half hours at the same speed?",
    "A box holds 24 pencils. A school orders 15 boxes and gives every one of its 120 pupils 2 pencils. How many are left?",
    "Tom earns $18 an hour. He works 6 hours a day, 5 days a week. How much does he earn in four weeks?",
    "A recipe for 4 people needs 300 grams of flour. How many grams are needed for 10 people?",
    "Sarah reads 25 pages a day. Her book has 400 pages, and she has read 150. In how many days will she finish it?",
    "A shirt costs $40. It is reduced by 25 %, and then by another $5. What is its price now?",
    "There are 7 rows of 9 chairs in a hall, and 17 of the chairs are broken. How many people can sit down?",
    "The ages of Ben and his mother add up to 48. His mother is three times as old as he is. How old is Ben?",
    "A tank of 500 litres is filled at 20 litres a minute and leaks 4 litres a minute. When is it half full?",
    "Mia saves $3 on the first day, and on each day $2 more than on the day before. How much has she saved after 6 days?",
    "A farmer has chickens and cows, 30 heads and 86 legs together. How many cows does he have?",
    "A car uses 6 litres of petrol for 100 km. Petrol costs $1.80 a litre. What does a journey of 250 km cost?",
    "Half of the 36 pupils in a class play football, and a third of those also play chess. How many play both?",
    "A rectangle is 8 cm wide and 5 cm high. By how much does its area grow if both sides become 2 cm longer?",
    "Paul runs 5 km in 30 minutes. At that pace, how many minutes does he need for 12 km?",
    "A baker makes 80 rolls. He sells three quarters of them in the morning and half of the rest at noon. How many remain?",
    "Two numbers have a sum of 50 and a difference of 14. What is the larger one?",
    "A cinema ticket is $9, for children $6. What do two adults and three children pay, with $4 off for a family?",
    "Lena's phone shows 80 %. It loses 5 % every 20 minutes. After how many hours is it at 20 %?",
]

ALL = [*QUESTIONS, *PROGRAMS, *SUMS]
