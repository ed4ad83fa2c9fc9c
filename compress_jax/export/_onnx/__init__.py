"""ONNX: conversion, quantized nodes, and the checks in ONNX Runtime."""
