// Products with packed matrices, as linear.cpp computes them.

#pragma once

#include <cstdint>

// A packed matrix [N, K]; kind: 0 float32, 1 bf16, 2 int8 with a scale for each of the N rows (else scales is NULL).
struct Matrix {
    const void *panels;
    const float *scales;
    int64_t N, K, kind;
};

enum Activation { NONE, TANH, SIGMOID, RELU2, SILU };

// y = activation(x W^T): x [n, K], float32 for kind 0, else bf16; y [n, N] float32, or bf16 where `narrow`; where `add`
// it is float32 and the result is added to what it holds.  Rows are `stride` and `y_stride` elements from each other.
struct Product {
    const Matrix *matrix;
    const void *x;
    int64_t stride;
    int activation;
    void *y;
    int64_t y_stride;
    bool narrow, add;
};

constexpr int MOST_PRODUCTS = 8;

// Bytes of scratch that one thread needs for matrices with K columns or fewer.
int64_t products_scratch(int64_t K);

// Up to MOST_PRODUCTS of them, for n rows each, that do not wait for one another.
// limit      : instruction sets allowed: 0 any processor's, 1 AVX2, 2 AVX-512, 3 with products of bf16 pairs, 4 AMX;
//              5: AMX in software
// scratch    : threads * products_scratch(largest K) bytes at a multiple of 64, contents undefined before and after
void products(int64_t n, const Product *jobs, int64_t count, int limit, int threads, char *scratch);
