// The scan of one image and one block of channels, all directions in turn: what a thread does. Float32 throughout; the
// driver (scan_cpu.cpp) converts other dtypes, splits the work, and adds up what blocks and images share.
//
// Compiled once per instruction set by kernel_*.cpp, which define VMAMBA_LANES and the target before including this.
#pragma once

#include "blocks.h"
#include "vector.h"

namespace {

using vmamba::Param;
using vmamba::Result;
using vmamba::Rows;
using vmamba::Scan;
using vmamba::cpu::BackwardTask;
using vmamba::cpu::ForwardTask;
using vmamba::cpu::kMaxTileSteps;

inline const float* row(const Rows& rows, int64_t image, int64_t direction, int64_t position) {
    return static_cast<const float*>(rows.data) + image * rows.image_stride + direction * rows.direction_stride +
           position * rows.position_stride;
}

// A block of M vectors, the last ones partly or wholly beyond the last channel: `count` channels are real.
template <int M>
struct Block {
    Vec v[M];

    static Block zero() {
        Block b;
        for (int m = 0; m < M; ++m) b.v[m] = Vec{};
        return b;
    }
    static Block read(const float* p, int count) {
        Block b;
        for (int m = 0; m < M; ++m) b.v[m] = load_some(p + m * kLanes, count - m * kLanes);
        return b;
    }
    void write(float* p, int count) const {
        for (int m = 0; m < M; ++m) store_some(p + m * kLanes, v[m], count - m * kLanes);
    }
    void add_to(float* p, int count) const {
        for (int m = 0; m < M; ++m)
            store_some(p + m * kLanes, load_some(p + m * kLanes, count - m * kLanes) + v[m], count - m * kLanes);
    }
    float total() const {
        Vec s = v[0];
        for (int m = 1; m < M; ++m) s += v[m];
        return sum(s);
    }
};

// One direction's parameters of one block of channels, channels innermost.
template <int M>
struct Parameters {
    static constexpr int kWidth = M * kLanes;

    const float* A;          // [N][kWidth], times log2(e)
    const float* dt_weight;  // [R][kWidth]
    Block<M> D, dt_bias;

    // Lays the parameters out in `memory`, which holds (N + R) * kWidth floats.
    Parameters(const Scan& scan, int64_t direction, int64_t channel, int count, float* memory) {
        float* a = memory;
        float* w = memory + scan.states * kWidth;
        transpose(scan.A, direction, channel, count, scan.states, kLog2e, a);
        if (scan.rank > 0) transpose(scan.dt_weight, direction, channel, count, scan.rank, 1.0f, w);
        A = a;
        dt_weight = w;
        D = vector(scan.D, direction, channel, count);
        dt_bias = vector(scan.dt_bias, direction, channel, count);
    }

  private:
    static void transpose(const Param& param, int64_t direction, int64_t channel, int count, int64_t columns,
                          float scale, float* to) {
        const float* from = param.data + direction * param.direction_stride + channel * columns;
        for (int64_t j = 0; j < columns; ++j)
            for (int c = 0; c < kWidth; ++c) to[j * kWidth + c] = c < count ? scale * from[c * columns + j] : 0.0f;
    }
    static Block<M> vector(const Param& param, int64_t direction, int64_t channel, int count) {
        if (!param.data) return Block<M>::zero();
        return Block<M>::read(param.data + direction * param.direction_stride + channel, count);
    }
};

// dt before softplus for `steps` steps: bias + low-rank product (or the full dt), bias alone where nothing is read.
template <int M>
void raw_steps(const Scan& scan, const Parameters<M>& parameters, int64_t image, int64_t direction, int64_t channel,
               int count, const int32_t* positions, int steps, float* dt) {
    constexpr int kWidth = M * kLanes;
    constexpr int kAtOnce = 4;  // steps that share one pass over the weights
    static const float kNothing[1] = {0.0f};
    for (int s = 0; s < steps; s += kAtOnce) {
        const int now = steps - s < kAtOnce ? steps - s : kAtOnce;
        if (scan.rank == 0) {
            for (int i = s; i < s + now; ++i) {
                Block<M> raw = parameters.dt_bias;
                if (positions[i] >= 0) {
                    const Block<M> full = Block<M>::read(row(scan.dt, image, direction, positions[i]) + channel, count);
                    for (int m = 0; m < M; ++m) raw.v[m] += full.v[m];
                }
                raw.write(dt + i * kWidth, kWidth);
            }
            continue;
        }
        // A step that reads nothing multiplies the weights by zero, kept in place by a stride of zero.
        const float* low[kAtOnce];
        int stride[kAtOnce];
        for (int i = 0; i < kAtOnce; ++i) {
            const bool reads = i < now && positions[s + i] >= 0;
            low[i] = reads ? row(scan.dt, image, direction, positions[s + i]) : kNothing;
            stride[i] = reads ? 1 : 0;
        }
        Block<M> raw[kAtOnce] = {parameters.dt_bias, parameters.dt_bias, parameters.dt_bias, parameters.dt_bias};
        for (int64_t r = 0; r < scan.rank; ++r) {
            for (int m = 0; m < M; ++m) {
                const Vec weight = load(parameters.dt_weight + r * kWidth + m * kLanes);
                for (int i = 0; i < kAtOnce; ++i) raw[i].v[m] += weight * low[i][r * stride[i]];
            }
        }
        for (int i = 0; i < now; ++i) raw[i].write(dt + (s + i) * kWidth, kWidth);
    }
}

inline void softplus_in_place(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) store(x + i, softplus(load(x + i)));
}

// The recurrence over one tile of steps. `state` is [N][kWidth] and carries on; Visit sees every step's state and
// input. N is the number of states if known at compile time, else 0.
template <int M, int N, typename Visit>
void advance(const Scan& scan, const Parameters<M>& parameters, int64_t image, int64_t direction, int64_t channel,
             int count, const int32_t* route, const int32_t* param_route, const uint8_t* reset, int steps,
             const float* dt_tile, float* state, Visit visit) {
    constexpr int kWidth = M * kLanes;
    const int64_t states = N > 0 ? N : scan.states;
    for (int s = 0; s < steps; ++s) {
        const bool reads = route[s] >= 0, has_params = param_route[s] >= 0;
        const Block<M> u =
            reads ? Block<M>::read(row(scan.u, image, direction, route[s]) + channel, count) : Block<M>::zero();
        const Block<M> dt = Block<M>::read(dt_tile + s * kWidth, kWidth);
        const float* B = has_params ? row(scan.B, image, direction, param_route[s]) : nullptr;
        const float carry = reset && reset[s] ? 0.0f : 1.0f;
        for (int64_t n = 0; n < states; ++n) {
            const float b = B ? B[n] : 0.0f;
            for (int m = 0; m < M; ++m) {
                float* h = state + n * kWidth + m * kLanes;
                const Vec decay = exp2(dt.v[m] * load(parameters.A + n * kWidth + m * kLanes)) * carry;
                store(h, decay * load(h) + dt.v[m] * u.v[m] * b);
            }
        }
        visit(s, u);
    }
}

template <int M, int N>
void forward_direction(const ForwardTask& task, int64_t direction, float* memory) {
    constexpr int kWidth = M * kLanes;
    const Scan& scan = *task.scan;
    const int64_t states = N > 0 ? N : scan.states;
    float* dt = memory;
    float* state = dt + kMaxTileSteps * kWidth;
    const Parameters<M> parameters(scan, direction, task.channel, task.count, state + states * kWidth);
    for (int64_t i = 0; i < states * kWidth; ++i) state[i] = 0.0f;

    const int32_t* route = scan.route.at(task.image, direction);
    const int32_t* param_route = scan.param_route.at(task.image, direction);
    const uint8_t* reset = scan.reset.at(task.image, direction);
    const int64_t first_row = (task.image * scan.directions + direction) * scan.steps;

    for (int64_t t = 0; t < scan.steps; t += kMaxTileSteps) {
        const int steps = scan.steps - t < kMaxTileSteps ? int(scan.steps - t) : kMaxTileSteps;
        if (task.checkpoints && t % scan.checkpoint_steps == 0) {
            const int64_t kept = (scan.steps + scan.checkpoint_steps - 1) / scan.checkpoint_steps;
            const int64_t index = (task.image * scan.directions + direction) * kept + t / scan.checkpoint_steps;
            float* to = task.checkpoints + (index * scan.channels + task.channel) * states;
            for (int c = 0; c < task.count; ++c)
                for (int64_t n = 0; n < states; ++n) to[c * states + n] = state[n * kWidth + c];
        }
        raw_steps<M>(scan, parameters, task.image, direction, task.channel, task.count, param_route + t, steps, dt);
        if (scan.dt_softplus) softplus_in_place(dt, int64_t(steps) * kWidth);

        advance<M, N>(scan, parameters, task.image, direction, task.channel, task.count, route + t, param_route + t,
                      reset ? reset + t : nullptr, steps, dt, state, [&](int s, const Block<M>& u) {
                          if (scan.result == Result::states) {
                              float* to = task.out + ((first_row + t + s) * scan.channels + task.channel) * states;
                              for (int c = 0; c < task.count; ++c)
                                  for (int64_t n = 0; n < states; ++n) to[c * states + n] = state[n * kWidth + c];
                              return;
                          }
                          const bool merged = scan.result == Result::merged, reads = route[t + s] >= 0;
                          if (merged && !reads) return;
                          Block<M> y = Block<M>::zero();
                          if (reads) {
                              for (int m = 0; m < M; ++m) y.v[m] = parameters.D.v[m] * u.v[m];
                              if (param_route[t + s] >= 0) {
                                  const float* C = row(scan.C, task.image, direction, param_route[t + s]);
                                  for (int64_t n = 0; n < states; ++n)
                                      for (int m = 0; m < M; ++m)
                                          y.v[m] += load(state + n * kWidth + m * kLanes) * C[n];
                              }
                          }
                          if (merged) {
                              const int64_t position = task.image * scan.length + route[t + s];
                              y.add_to(task.out + position * scan.channels + task.channel, task.count);
                          } else {
                              y.write(task.out + (first_row + t + s) * scan.channels + task.channel, task.count);
                          }
                      });
    }
}

template <int M, int N>
void forward_task(const ForwardTask& task, float* memory) {
    const Scan& scan = *task.scan;
    if (scan.result == Result::merged) {
        for (int64_t p = 0; p < scan.length; ++p) {
            float* to = task.out + (task.image * scan.length + p) * scan.channels + task.channel;
            for (int c = 0; c < task.count; ++c) to[c] = 0.0f;
        }
    }
    for (int64_t direction = 0; direction < scan.directions; ++direction)
        forward_direction<M, N>(task, direction, memory);
}

// Adds ddt_raw (the gradient of dt before softplus) of one chunk to dt_low's rows, and to the weights' gradient.
// `weight_rows` is (kWidth, padded R): one row of weights per channel; `dweight` is (R, kWidth).
template <int M>
void low_rank_gradients(const BackwardTask& task, int64_t direction, const int32_t* param_route, int steps,
                        const float* ddt, const float* weight_rows, int64_t padded_rank, float* dweight) {
    constexpr int kWidth = M * kLanes;
    const Scan& scan = *task.scan;
    const int64_t dt_directions = scan.dt.direction_stride == 0 ? 1 : scan.directions;
    for (int s = 0; s < steps; ++s) {
        if (param_route[s] < 0) continue;
        const float* g = ddt + s * kWidth;
        const float* low = row(scan.dt, task.image, direction, param_route[s]);
        float* dlow = task.dt_low + (param_route[s] * dt_directions + (dt_directions == 1 ? 0 : direction)) * scan.rank;
        for (int64_t r = 0; r < padded_rank; r += kLanes) {
            Vec total = {}, other = {};
            for (int c = 0; c < kWidth; c += 2) {
                total += g[c] * load(weight_rows + c * padded_rank + r);
                other += g[c + 1] * load(weight_rows + (c + 1) * padded_rank + r);
            }
            const int real = int(scan.rank - r);
            store_some(dlow + r, load_some(dlow + r, real) + total + other, real);
        }
        for (int64_t r = 0; r < scan.rank; ++r)
            for (int m = 0; m < M; ++m) {
                float* to = dweight + r * kWidth + m * kLanes;
                store(to, load(to) + load(g + m * kLanes) * low[r]);
            }
    }
}

// Scratch of the backward of one direction, carved from one piece of memory (see backward_memory).
template <int M>
struct BackwardScratch {
    static constexpr int kWidth = M * kLanes;
    float *dt, *slope, *u, *before, *dstate, *dA, *ddt, *dweight, *weight_rows, *parameters;
    int64_t padded_rank;

    BackwardScratch(const Scan& scan, float* memory) {
        const int64_t chunk = scan.checkpoint_steps * kWidth;
        padded_rank = (scan.rank + kLanes - 1) / kLanes * kLanes;
        const auto take = [&](int64_t floats) {
            float* piece = memory;
            memory += floats;
            return piece;
        };
        dt = take(chunk);
        slope = take(chunk);  // d softplus
        u = take(chunk);
        ddt = take(chunk);
        before = take(chunk * scan.states + scan.states * kWidth);  // the state before each step, and after the last
        dstate = take(scan.states * kWidth);
        dA = take(scan.states * kWidth);
        dweight = take(scan.rank * kWidth);
        weight_rows = take(padded_rank * kWidth);
        parameters = take((scan.states + scan.rank) * kWidth);
    }
};

// Forms dt, its slope, u and every state of one chunk, from the chunk's checkpoint.
template <int M, int N>
void recompute_chunk(const BackwardTask& task, const Parameters<M>& parameters, int64_t direction, int64_t t, int steps,
                     BackwardScratch<M>& scratch) {
    constexpr int kWidth = M * kLanes;
    const Scan& scan = *task.scan;
    const int64_t states = N > 0 ? N : scan.states;
    const int32_t* param_route = scan.param_route.at(task.image, direction) + t;
    const uint8_t* reset = scan.reset.at(task.image, direction);

    raw_steps<M>(scan, parameters, task.image, direction, task.channel, task.count, param_route, steps, scratch.dt);
    for (int64_t i = 0; i < int64_t(steps) * kWidth; i += kLanes) {
        const Vec raw = load(scratch.dt + i);
        store(scratch.slope + i, scan.dt_softplus ? sigmoid(raw) : splat(1.0f));
        if (scan.dt_softplus) store(scratch.dt + i, softplus(raw));
    }

    const int64_t kept = (scan.steps + scan.checkpoint_steps - 1) / scan.checkpoint_steps;
    const int64_t index = (task.image * scan.directions + direction) * kept + t / scan.checkpoint_steps;
    const float* checkpoint = task.checkpoints + (index * scan.channels + task.channel) * states;
    for (int64_t n = 0; n < states; ++n)
        for (int c = 0; c < kWidth; ++c)
            scratch.before[n * kWidth + c] = c < task.count ? checkpoint[c * states + n] : 0.0f;

    const int64_t size = states * kWidth;
    for (int s = 0; s < steps; ++s) {
        float* state = scratch.before + s * size;
        for (int64_t i = 0; i < size; i += kLanes) store(state + size + i, load(state + i));
        const int32_t* route = scan.route.at(task.image, direction) + t + s;
        advance<M, N>(scan, parameters, task.image, direction, task.channel, task.count, route, param_route + s,
                      reset ? reset + t + s : nullptr, 1, scratch.dt + s * kWidth, state + size,
                      [&](int, const Block<M>& u) { u.write(scratch.u + s * kWidth, kWidth); });
    }
}

template <int M, int N>
void backward_direction(const BackwardTask& task, int64_t direction, float* memory) {
    constexpr int kWidth = M * kLanes;
    const Scan& scan = *task.scan;
    const int64_t states = N > 0 ? N : scan.states, size = states * kWidth;
    BackwardScratch<M> scratch(scan, memory);
    const Parameters<M> parameters(scan, direction, task.channel, task.count, scratch.parameters);
    for (int64_t i = 0; i < size; ++i) scratch.dstate[i] = scratch.dA[i] = 0.0f;
    for (int64_t i = 0; i < scan.rank * kWidth; ++i) scratch.dweight[i] = 0.0f;
    if (scan.rank > 0) {
        const float* weight =
            scan.dt_weight.data + direction * scan.dt_weight.direction_stride + task.channel * scan.rank;
        for (int c = 0; c < kWidth; ++c)
            for (int64_t r = 0; r < scratch.padded_rank; ++r)
                scratch.weight_rows[c * scratch.padded_rank + r] =
                    c < task.count && r < scan.rank ? weight[c * scan.rank + r] : 0.0f;
    }

    const int32_t* route = scan.route.at(task.image, direction);
    const int32_t* param_route = scan.param_route.at(task.image, direction);
    const uint8_t* reset = scan.reset.at(task.image, direction);
    const bool shared_u = scan.u.direction_stride == 0;
    const int64_t u_plane = shared_u ? task.image : task.image * scan.directions + direction;
    const auto shared_row = [&](const Rows& rows, int64_t position) {
        return rows.direction_stride == 0 ? position : position * scan.directions + direction;
    };
    const int64_t dt_directions = scan.dt.direction_stride == 0 ? 1 : scan.directions;
    const int64_t first_row = (task.image * scan.directions + direction) * scan.steps;
    Block<M> dD = Block<M>::zero(), dt_bias = Block<M>::zero();

    const int64_t chunks = (scan.steps + scan.checkpoint_steps - 1) / scan.checkpoint_steps;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * scan.checkpoint_steps;
        const int steps = int(scan.steps - t0 < scan.checkpoint_steps ? scan.steps - t0 : scan.checkpoint_steps);
        recompute_chunk<M, N>(task, parameters, direction, t0, steps, scratch);

        for (int s = steps - 1; s >= 0; --s) {
            const int64_t t = t0 + s, position = route[t], param_position = param_route[t];
            const float* B = param_position >= 0 ? row(scan.B, task.image, direction, param_position) : nullptr;
            const float* C = scan.C.data && scan.result != Result::states && param_position >= 0 && position >= 0
                                 ? row(scan.C, task.image, direction, param_position)
                                 : nullptr;
            float* dB = B ? task.B + shared_row(scan.B, param_position) * states : nullptr;
            float* dC = C ? task.C + shared_row(scan.C, param_position) * states : nullptr;
            const Block<M> u = Block<M>::read(scratch.u + s * kWidth, kWidth);
            const Block<M> dt = Block<M>::read(scratch.dt + s * kWidth, kWidth);

            Block<M> gy = Block<M>::zero();
            if (scan.result == Result::merged && position >= 0) {
                gy = Block<M>::read(task.grad + (task.image * scan.length + position) * scan.channels + task.channel,
                                    task.count);
            } else if (scan.result == Result::steps && position >= 0) {
                gy = Block<M>::read(task.grad + (first_row + t) * scan.channels + task.channel, task.count);
            } else if (scan.result == Result::states) {
                const float* from = task.grad + ((first_row + t) * scan.channels + task.channel) * states;
                for (int c = 0; c < task.count; ++c)
                    for (int64_t n = 0; n < states; ++n) scratch.dstate[n * kWidth + c] += from[c * states + n];
            }

            const float carry = reset && reset[t] ? 0.0f : 1.0f;
            Block<M> du, ddt = Block<M>::zero();
            for (int m = 0; m < M; ++m) {
                du.v[m] = parameters.D.v[m] * gy.v[m];
                dD.v[m] += u.v[m] * gy.v[m];
            }
            for (int64_t n = 0; n < states; ++n) {
                const float b = B ? B[n] : 0.0f, c = C ? C[n] : 0.0f;
                Block<M> for_B, for_C;
                for (int m = 0; m < M; ++m) {
                    const int64_t at = n * kWidth + m * kLanes;
                    const Vec a = load(parameters.A + at);
                    const Vec before = load(scratch.before + s * size + at) * carry;
                    const Vec decay = exp2(dt.v[m] * a);
                    const Vec dh = load(scratch.dstate + at) + gy.v[m] * c;
                    const Vec kept = dh * decay;        // what flows on to the state before
                    const Vec decayed = kept * before;  // d loss / d (dt * A)
                    const Vec dt_dh = dt.v[m] * dh;
                    for_B.v[m] = dt_dh * u.v[m];
                    for_C.v[m] = gy.v[m] * load(scratch.before + (s + 1) * size + at);
                    du.v[m] += dt_dh * b;
                    ddt.v[m] += decayed * (a / kLog2e) + dh * u.v[m] * b;
                    store(scratch.dA + at, load(scratch.dA + at) + dt.v[m] * decayed);
                    store(scratch.dstate + at, kept * carry);
                }
                if (dB) dB[n] += for_B.total();
                if (dC) dC[n] += for_C.total();
            }
            for (int m = 0; m < M; ++m) {
                ddt.v[m] *= load(scratch.slope + s * kWidth + m * kLanes);
                dt_bias.v[m] += ddt.v[m];
            }
            ddt.write(scratch.ddt + s * kWidth, kWidth);
            if (position >= 0) {
                du.add_to(task.u + (u_plane * scan.length + position) * scan.channels + task.channel, task.count);
            }
            if (task.dt_full && param_position >= 0) {
                const int64_t at = task.image * scan.length * dt_directions + shared_row(scan.dt, param_position);
                ddt.add_to(task.dt_full + at * scan.channels + task.channel, task.count);
            }
        }
        if (task.dt_low) {
            low_rank_gradients<M>(task, direction, param_route + t0, steps, scratch.ddt, scratch.weight_rows,
                                  scratch.padded_rank, scratch.dweight);
        }
    }

    const auto own = [&](const Param& param, int64_t features) {
        return (param.direction_stride == 0 ? 0 : direction * scan.channels * features) + task.channel * features;
    };
    for (int c = 0; c < task.count; ++c) {
        for (int64_t n = 0; n < states; ++n) task.A[own(scan.A, states) + c * states + n] += scratch.dA[n * kWidth + c];
        if (task.dt_weight)
            for (int64_t r = 0; r < scan.rank; ++r)
                task.dt_weight[own(scan.dt_weight, scan.rank) + c * scan.rank + r] += scratch.dweight[r * kWidth + c];
    }
    if (task.D) dD.add_to(task.D + own(scan.D, 1), task.count);
    if (task.dt_bias) dt_bias.add_to(task.dt_bias + own(scan.dt_bias, 1), task.count);
}

template <int M, int N>
void backward_task(const BackwardTask& task, float* memory) {
    for (int64_t direction = 0; direction < task.scan->directions; ++direction)
        backward_direction<M, N>(task, direction, memory);
}

void run_forward(const ForwardTask& task, int vectors, float* memory) {
    const bool one_state = task.scan->states == 1;
    if (vectors == 1) {
        one_state ? forward_task<1, 1>(task, memory) : forward_task<1, 0>(task, memory);
    } else {
        one_state ? forward_task<2, 1>(task, memory) : forward_task<2, 0>(task, memory);
    }
}

void run_backward(const BackwardTask& task, int vectors, float* memory) {
    const bool one_state = task.scan->states == 1;
    if (vectors == 1) {
        one_state ? backward_task<1, 1>(task, memory) : backward_task<1, 0>(task, memory);
    } else {
        one_state ? backward_task<2, 1>(task, memory) : backward_task<2, 0>(task, memory);
    }
}

}  // namespace
