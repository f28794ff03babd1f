"""Draft trees and one decode step, as data; imports no vLLM."""
