"""Published checkpoints in, a model repository out: conversion, model cards, checks, upload."""
