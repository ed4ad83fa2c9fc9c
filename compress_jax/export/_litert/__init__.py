"""LiteRT: conversion and quantization in a child process."""
