// Chains of operations on a GPU as one kernel each: kernels.py launches them. The formulas are
// those of the functions whose names they have.
//
// `real` is float or double, as the compiler is told. Unless it says otherwise, a block of threads
// works on one row, number blockIdx.x, and a thread takes every blockDim.x-th entry of it. A block
// has a multiple of 32 threads, which are a warp, and at most 1024. An array that is not there is 0.

#define KERNEL extern "C" __global__ void
#define EACH(i, n) for (int i = threadIdx.x; i < (n); i += blockDim.x)
#define ONE_ENTRY(i, n) \
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= (n)) return
#define WRAPPED(i, n) (((i) % (n) + (n)) % (n))  // as CuPy does with ids out of range

template <class T> __device__ T warp_reduce(T x, bool largest) {
    for (int step = 16; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, x, step);
        x = largest ? fmax(x, other) : x + other;
    }
    return x;
}

// the largest, or the sum, of one number a thread of the block; every thread gets it
template <class T> __device__ T block_reduce(T x, bool largest) {
    __shared__ T of_warp[32];
    const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    x = warp_reduce(x, largest);
    __syncthreads();  // somebody may still be reading what was there before
    if (lane == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < n_warps ? of_warp[lane] : largest ? of_warp[0] : T(0);
    return warp_reduce(x, largest);
}

#define block_sum(x) block_reduce(x, false)
#define block_max(x) block_reduce(x, true)

// -- norms ----------------------------------------------------------------------------------------
// y = gain xhat + bias,  xhat = (x - mean) rstd,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
// No bias, RMSNorm: mean = 0.  x is the sum of a product, its bias and a residual, kept in `sum`
// where there is one.
KERNEL norm_forward(const real* product, const real* product_bias, const real* residual,
    const real* gain, const real* bias, real* sum, real* y, real* xhat, real* rstd, long long C,
    double eps) {
    const long long at = blockIdx.x * C;
    const real* x = sum ? sum : product;
    real total = 0, squares = 0;
    EACH(c, C) {
        const real added = product_bias ? product_bias[c] : (real)0;
        if (sum) sum[at + c] = product[at + c] + added + residual[at + c];
        total += x[at + c];
    }
    const real mean = bias ? block_sum(total) / C : (real)0;
    EACH(c, C) squares += (x[at + c] - mean) * (x[at + c] - mean);
    const real scale = 1 / sqrt(block_sum(squares) / C + (real)eps);
    EACH(c, C) {
        xhat[at + c] = (x[at + c] - mean) * scale;
        y[at + c] = xhat[at + c] * gain[c] + (bias ? bias[c] : (real)0);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
}

// dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),  dxhat = dy gain
// not centred: without mean(dxhat)
KERNEL norm_backward(const real* dy, const real* xhat, const real* gain, const real* rstd, real* dx,
    long long C, int centred) {
    dy += blockIdx.x * C, xhat += blockIdx.x * C, dx += blockIdx.x * C;
    real sum = 0, along = 0;
    EACH(c, C) {
        sum += dy[c] * gain[c];
        along += dy[c] * gain[c] * xhat[c];
    }
    const real mean_dxhat = centred ? block_sum(sum) / C : (real)0;
    const real mean_along = block_sum(along) / C;
    EACH(c, C)
        dx[c] = rstd[blockIdx.x] * (dy[c] * gain[c] - mean_dxhat - xhat[c] * mean_along);
}

// y += bias + residual, in place
KERNEL add_bias(const real* bias, const real* residual, real* y, long long n, long long C) {
    ONE_ENTRY(i, n);
    y[i] += bias ? bias[i % C] + residual[i] : residual[i];
}

// sum_a[c] = sum_r a[r, c],  sum_ab[c] = sum_r a[r, c] b[r, c] where there is a b
// A block sums 8 columns, which lie in one sector of memory; its size is a power of two.
KERNEL column_sums(const real* a, const real* b, real* sum_a, real* sum_ab, long long C,
    long long n_rows) {
    __shared__ real of_a[1024], of_ab[1024];
    const int at = threadIdx.x, n_lanes = blockDim.x / 8;
    const long long c = 8LL * blockIdx.x + at % 8;
    real a_sum = 0, ab_sum = 0;
    for (long long r = at / 8; c < C && r < n_rows; r += n_lanes) {
        a_sum += a[r * C + c];
        if (b) ab_sum += a[r * C + c] * b[r * C + c];
    }
    of_a[at] = a_sum, of_ab[at] = ab_sum;
    for (int half = n_lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (at / 8 < half) {
            of_a[at] += of_a[at + 8 * half];
            of_ab[at] += of_ab[at + 8 * half];
        }
    }
    if (at >= 8 || c >= C) return;
    sum_a[c] = of_a[at];
    if (b) sum_ab[c] = of_ab[at];
}

// -- activations: one thread an entry -------------------------------------------------------------
// y = x s,  s = 1 / (1 + exp(-v)),  v = k (x + 0.044715 x^3),  k = 2 sqrt(2 / pi),  x = u + bias
// slope = dy/dx = s + x s (1 - s) v',  v' = k (1 + 3 * 0.044715 x^2)
KERNEL gelu_forward(const real* u, const real* bias, real* y, real* slope, long long n,
    int F) {
    ONE_ENTRY(i, n);
    const real x = bias ? u[i] + bias[i % F] : u[i];
    const real k = 1.5957691216057308, cubic = 0.044715, square = x * x;
    const real s = 1 / (1 + exp(-k * (1 + cubic * square) * x));
    y[i] = x * s;
    if (slope) slope[i] = s + k * (1 + 3 * cubic * square) * (1 - s) * y[i];
}

// y = swish up,  swish = gate s,  s = 1 / (1 + exp(-gate)),  slope = s + gate s (1 - s)
KERNEL swiglu_forward(const real* gate, const real* up, real* y, real* swish, real* slope,
    long long n) {
    ONE_ENTRY(i, n);
    const real s = 1 / (1 + exp(-gate[i])), swished = gate[i] * s;
    y[i] = swished * up[i];
    if (!slope) return;
    swish[i] = swished;
    slope[i] = s + swished * (1 - s);
}

// dgate = dy up slope,  dup = dy swish
KERNEL swiglu_backward(const real* dy, const real* up, const real* swish, const real* slope,
    real* dgate, real* dup, long long n) {
    ONE_ENTRY(i, n);
    dgate[i] = dy[i] * up[i] * slope[i];
    dup[i] = dy[i] * swish[i];
}

// -- attention ------------------------------------------------------------------------------------
// allowed[b, i, j] = 1 if j <= i and j is no padding, or j = i; else 0.  A row is (b, i).
KERNEL causal_mask(const real* mask, real* allowed, long long T) {
    const long long b = blockIdx.x / T, i = blockIdx.x % T;
    EACH(j, T) allowed[blockIdx.x * T + j] = (j <= i && mask[b * T + j] > 0) || j == i;
}

// Of qkv = product + bias (B, T, W), W = (H + 2K) D, side by side, each head by itself:
// q_heads (B, H, Q, D) scaled, of the given columns or of all; k_heads and v_heads (B, K, T, D).
// q (B, Q, H D) is q_heads side by side.  A row is (b, t).
KERNEL split_heads(const real* product, const real* bias, const long long* columns, real* qkv,
    real* q, real* q_heads, real* k_heads, real* v_heads, int W, int T, int Q, int D, int K,
    double scale) {
    const long long b = blockIdx.x / T, t = blockIdx.x % T, H = W / D - 2 * K;
    const long long s = t < Q && columns ? WRAPPED(columns[b * Q + t], T) : t;
    EACH(w, W) {
        const int head = w / D, d = w % D, k = (head - (int)H) % K;
        const long long at = (long long)blockIdx.x * W + w;
        const real added = bias ? bias[w] : (real)0, x = product[at] + added;
        if (bias) qkv[at] = x;
        if (head >= H) (head < H + K ? k_heads : v_heads)[((b * K + k) * T + t) * D + d] = x;
        if (head >= H || t >= Q) continue;
        const real scaled = (product[(b * T + s) * W + w] + added) * (real)scale;
        q[(b * Q + t) * H * D + w] = scaled;
        q_heads[((b * H + head) * Q + t) * D + d] = scaled;
    }
}

// E_j = exp(score_j - max) over the allowed j, 0 at the others, in place;  total = sum_j E_j
// A row is (b, k, g, i): the i-th query, of a column t that is given or i, of a head of group k.
KERNEL masked_exp(const real* allowed, const long long* columns, real* score, real* total,
    int T, int Q, int of_batch) {
    const long long b = blockIdx.x / of_batch, i = blockIdx.x % Q;
    const long long t = columns ? WRAPPED(columns[b * Q + i], T) : i;
    score += (long long)blockIdx.x * T, allowed += (b * T + t) * T;
    real highest = log((real)0), sum = 0;  // -inf
    EACH(j, T) if (allowed[j] > 0) highest = fmax(highest, score[j]);
    highest = block_max(highest);
    EACH(j, T) {
        score[j] = allowed[j] > 0 ? exp(score[j] - highest) : (real)0;
        sum += score[j];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[blockIdx.x] = sum;
}

// side[b, i, h, d] = heads[b, h, i, d] / total[b, h, i],  or, to_heads, the same the other way
// A row is (b, i) of side.
KERNEL over_total(const real* from, const real* total, real* to, int width, int Q, int D,
    int to_heads) {
    const long long b = blockIdx.x / Q, i = blockIdx.x % Q, H = width / D;
    EACH(w, width) {
        const long long row = (b * H + w / D) * Q + i, in_heads = row * D + w % D;
        const long long in_side = (long long)blockIdx.x * width + w;
        to[to_heads ? in_heads : in_side] = from[to_heads ? in_side : in_heads] / total[row];
    }
}

// dscore_j = E_j (dA_j - sum_k E_k dA_k / total), in place; dA has been divided by total
KERNEL softmax_backward(const real* exp_scores, const real* total, real* dscore, long long T) {
    exp_scores += blockIdx.x * T, dscore += blockIdx.x * T;
    real sum = 0;
    EACH(j, T) sum += exp_scores[j] * dscore[j];
    sum = block_sum(sum) / total[blockIdx.x];
    EACH(j, T) dscore[j] = (dscore[j] - sum) * exp_scores[j];
}

// `split_heads` undone: dqkv (B, T, W); dq is 0 at columns that were not taken.  A row is (b, t).
KERNEL join_heads(const real* dq, const real* dk, const real* dv, const long long* columns,
    real* dqkv, int W, int T, int Q, int D, int K, double scale) {
    const long long b = blockIdx.x / T, t = blockIdx.x % T, H = W / D - 2 * K;
    real place = columns ? -1 : t;  // of t among the columns
    if (columns) EACH(i, Q) if (WRAPPED(columns[b * Q + i], T) == t) place = i;
    const long long i = block_max(place);
    EACH(w, W) {
        const int head = w / D, d = w % D, k = (head - (int)H) % K;
        real x = 0;
        if (head >= H) x = (head < H + K ? dk : dv)[((b * K + k) * T + t) * D + d];
        else if (i >= 0) x = dq[((b * H + head) * Q + i) * D + d] * (real)scale;
        dqkv[(long long)blockIdx.x * W + w] = x;
    }
}

// -- log-probs: a row is the logits of one token --------------------------------------------------
// exp_z_a = exp((z_a - max) / tau),  total = sum_a exp_z_a,  logp = (z_y - max) / tau - log total
// exp_z may be the memory of the logits.
KERNEL token_logprobs_forward(const real* logits, const long long* targets, real* exp_z,
    real* total, real* logp, long long V, double temperature) {
    const long long at = blockIdx.x * V, y = WRAPPED(targets[blockIdx.x], V);
    const real per_tau = 1 / (real)temperature;
    real highest = logits[at], sum = 0;
    EACH(a, V) highest = fmax(highest, logits[at + a]);
    highest = block_max(highest);
    const real z_y = (logits[at + y] - highest) * per_tau;
    __syncthreads();  // read before it is overwritten
    EACH(a, V) {
        const real e = exp((logits[at + a] - highest) * per_tau);
        exp_z[at + a] = e;
        sum += e;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[blockIdx.x] = sum, logp[blockIdx.x] = z_y - log(sum);
}

// dz_a = dlogp (1[a = y] - exp_z_a / total) / tau
KERNEL token_logprobs_backward(const real* dlogp, const real* exp_z, const real* total,
    const long long* targets, real* dz, long long V, double temperature) {
    const long long at = blockIdx.x * V, y = WRAPPED(targets[blockIdx.x], V);
    const real d = dlogp[blockIdx.x] / (real)temperature, d_over_total = d / total[blockIdx.x];
    EACH(a, V) dz[at + a] = (a == y ? d : (real)0) - exp_z[at + a] * d_over_total;
}

// log_probs_a = z_a - log sum_b exp z_b,  z = (logits - max) / tau
__device__ real log_total(const real* logits, long long V, real per_tau, real* highest) {
    real sum = 0;
    *highest = logits[0];
    EACH(a, V) *highest = fmax(*highest, logits[a]);
    *highest = block_max(*highest);
    EACH(a, V) sum += exp((logits[a] - *highest) * per_tau);
    return log(block_sum(sum));
}

KERNEL log_softmax(const real* logits, real* log_probs, long long V, double temperature) {
    const real per_tau = 1 / (real)temperature;
    logits += blockIdx.x * V, log_probs += blockIdx.x * V;
    real highest;
    const real log_sum = log_total(logits, V, per_tau, &highest);
    EACH(a, V) log_probs[a] = (logits[a] - highest) * per_tau - log_sum;
}

// H = -sum_a P_a log P_a;  where P_a = 0, log P_a is written as 0
KERNEL entropy_forward(const real* logits, real* probs, real* log_probs, real* entropy, long long V,
    double temperature) {
    const real per_tau = 1 / (real)temperature;
    const long long at = blockIdx.x * V;
    real highest, sum = 0;
    const real log_sum = log_total(logits + at, V, per_tau, &highest);
    EACH(a, V) {
        const real log_p = (logits[at + a] - highest) * per_tau - log_sum, p = exp(log_p);
        probs[at + a] = p;
        log_probs[at + a] = p > 0 ? log_p : (real)0;
        sum -= p * log_probs[at + a];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) entropy[blockIdx.x] = sum;
}

// dz_a = -dH P_a (log P_a + H) / tau
KERNEL entropy_backward(const real* dentropy, const real* probs, const real* log_probs,
    const real* entropy, real* dz, long long V, double temperature) {
    const real d = -dentropy[blockIdx.x] / (real)temperature, H = entropy[blockIdx.x];
    const long long at = blockIdx.x * V;
    EACH(a, V) dz[at + a] = (log_probs[at + a] + H) * probs[at + a] * d;
}

// -- one more token -------------------------------------------------------------------------------
// Where there are steps, a sequence has its own, to be added to `column` or `step`.

// x = wte[token] + wpe[position]: the token stands at `column`, and is real if its mask says so.
// position = max(0, real tokens so far - 1).  A row is a sequence.
KERNEL embed_token(const real* wte, const real* wpe, const long long* tokens, const real* mask,
    const long long* steps, real* x, long long* position, real* seen, int C, int V, int n_ctx,
    int S, int column) {
    const long long b = blockIdx.x, token = WRAPPED(tokens[b], V);
    column += steps ? steps[b] : 0, seen += b * S;
    real n_real = 0;
    EACH(s, column) n_real += seen[s] > 0;
    const int all = block_sum(n_real) + (mask[b] > 0), at = all > 0 ? all - 1 : 0;
    if (threadIdx.x == 0) seen[column] = mask[b], position[b] = at;
    EACH(c, C) {
        const real x_position = wpe ? wpe[WRAPPED(at, n_ctx) * C + c] : (real)0;
        x[b * C + c] = wte[token * C + c] + x_position;
    }
}

// cos and sin of position theta^(-i / n), i = 0 .. n - 1: in double, or large ones lose their digits
KERNEL angles(const long long* position, real* cosine, real* sine, long long n, double theta) {
    EACH(i, n) {
        const double angle = position[blockIdx.x] * pow(theta, -i / (double)n);
        cosine[blockIdx.x * n + i] = cos(angle), sine[blockIdx.x * n + i] = sin(angle);
    }
}

__device__ real added(const real* product, const real* bias, int i) {
    return bias ? product[i] + bias[i] : product[i];
}

// (x_d, x_(d + D/2)) turned by the d-th angle, or x where there are none;  x = product + bias
__device__ real turned(const real* product, const real* bias, const real* cos, const real* sin,
    int start, int d, int D) {
    const real x = added(product, bias, start + d);
    if (!cos) return x;
    const int half = D / 2, i = d % half, other = d < half ? d + half : i;
    const real y = added(product, bias, start + other);
    return d < half ? x * cos[i] - y * sin[i] : x * cos[i] + y * sin[i];
}

// out = sum_j A_j v_j,  A = softmax_j(q k_j scale) over the tokens j seen and the one at `column`,
// whose k and v are kept. A row is (b, head); a warp takes a j, then a lane a d. D <= 256.
KERNEL attend(const real* product, const real* bias, const real* cos, const real* sin,
    const real* seen, const long long* steps, real* keys, real* values, real* score, real* out,
    int S, int column, int H, int K, int D, double scale) {
    __shared__ real q[256], k[256], v[256], sums[1024];
    const int head = blockIdx.x % H, group = head / (H / K), warp = threadIdx.x / 32;
    const int n_warps = blockDim.x / 32, lane = threadIdx.x % 32, of_k = (H + group) * D;
    const long long b = blockIdx.x / H, at = (b * K + group) * S * D;
    column += steps ? steps[b] : 0;
    product += b * (H + 2 * K) * D, seen += b * S, keys += at, values += at;
    if (cos) cos += b * (D / 2), sin += b * (D / 2);
    score += (long long)blockIdx.x * S, out += (long long)blockIdx.x * D;
    EACH(d, D) {
        q[d] = turned(product, bias, cos, sin, head * D, d, D) * (real)scale;
        k[d] = turned(product, bias, cos, sin, of_k, d, D);
        v[d] = added(product, bias, of_k + K * D + d);
        if (head % (H / K) == 0) keys[column * D + d] = k[d], values[column * D + d] = v[d];
    }
    __syncthreads();
    real highest = log((real)0), total = 0;  // -inf
    for (int j = warp; j <= column; j += n_warps) {
        real sum = 0;
        for (int d = lane; d < D; d += 32) sum += q[d] * (j < column ? keys[j * D + d] : k[d]);
        sum = j == column || seen[j] > 0 ? warp_reduce(sum, false) : log((real)0);
        if (lane == 0) score[j] = sum;
        highest = fmax(highest, sum);
    }
    highest = block_max(highest);  // a barrier: all scores are there
    EACH(j, column + 1) total += score[j] = exp(score[j] - highest);
    total = block_sum(total);
    for (int d = lane; d - lane < D; d += 32) {
        real sum = 0;
        for (int j = warp; d < D && j <= column; j += n_warps)
            sum += score[j] * (j < column ? values[j * D + d] : v[d]);
        __syncthreads();
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (int w = 1; warp == 0 && w < n_warps; w++) sum += sums[32 * w + lane];
        if (warp == 0 && d < D) out[d] = sum / total;
    }
}

// id = the first token with p > 0 and cdf > u total, else the last with p > 0;
// cdf_a = p_0 + .. + p_a,  p = exp(log_probs).  Where the response has ended, id = pad.
// Written to the row that is given, with the h it was drawn from. A row is the b-th of those.
// Thread t holds the t-th run of tokens. At most 1024 threads; sums in double, or ids would move.
// new_alive may be the memory of alive.
KERNEL draw_into(const real* log_probs, const real* h, const double* u, const long long* rows,
    const real* alive, long long* tokens, real* mask, real* hidden, long long* ids, real* is_real,
    real* new_alive, long long* steps, int V, int C, int R, int T, int step, int stop, int pad) {
    __shared__ double of_run[1024], total;
    __shared__ int first, last;
    const long long b = blockIdx.x, row = rows[b];
    step += steps ? steps[b] : 0;
    const long long column = row * T + T - R + step;
    const int length = (V + blockDim.x - 1) / blockDim.x, start = threadIdx.x * length;
    const int end = start + length < V ? start + length : V;
    log_probs += b * V;
    double sum = 0;
    for (int a = start; a < end; a++) sum += exp(log_probs[a]);
    of_run[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        first = V, last = 0, total = 0;
        for (int run = 0; run < blockDim.x; run++) {
            const double of_this = of_run[run];
            of_run[run] = total, total += of_this;  // what comes before it
        }
    }
    __syncthreads();
    double before = of_run[threadIdx.x];
    const double drawn = u[row * R + step] * total;
    int found = V, likely = 0;
    for (int a = start; a < end; a++) {
        const real p = exp(log_probs[a]);
        before += p;
        if (p > 0) likely = a;
        if (p > 0 && before > drawn && found == V) found = a;
    }
    atomicMin(&first, found), atomicMax(&last, likely);
    EACH(c, C) hidden[(row * R + step) * C + c] = h[b * C + c];
    __syncthreads();
    if (threadIdx.x) return;
    ids[b] = tokens[column] = !(alive[b] > 0) ? pad : first < V ? first : last;
    mask[column] = is_real[b] = alive[b], new_alive[b] = ids[b] == stop ? 0 : alive[b];
    if (steps) steps[b]++;
}

// y = x w:  x (b, I), w (I, O).  A block takes 8 columns, which lie in one sector of memory, of 8
// rows; 64 threads share the sum of a column.
KERNEL few_rows(const real* x, const real* w, real* y, int O, int b, int I) {
    __shared__ real sums[8][16][8];
    const int tiles = (O + 7) / 8, warp = threadIdx.x / 32, column = threadIdx.x % 8;
    const int o = blockIdx.x % tiles * 8 + column, first = blockIdx.x / tiles * 8;
    real sum[8] = {};
    x += (long long)first * I, y += (long long)first * O;
    for (long long i = threadIdx.x / 8; o < O && i < I; i += 64) {
        const real entry = w[i * O + o];
        for (int row = 0; row < 8; row++)
            if (first + row < b) sum[row] += x[(long long)row * I + i] * entry;
    }
    for (int row = 0; row < 8; row++) {
        real of_warp = sum[row] + __shfl_xor_sync(0xffffffffu, sum[row], 8);
        of_warp += __shfl_xor_sync(0xffffffffu, of_warp, 16);
        if (threadIdx.x % 32 < 8) sums[row][warp][column] = of_warp;
    }
    __syncthreads();
    const int row = threadIdx.x / 8;
    if (row >= 8 || first + row >= b || o >= O) return;
    real total = 0;
    for (int i = 0; i < 16; i++) total += sums[row][i][column];
    y[(long long)row * O + o] = total;
}

// y = x w^T:  x (b, I), w (O, I).  A block takes 32 columns of 8 rows; a warp a column, a lane an i.
KERNEL few_rows_transposed(const real* x, const real* w, real* y, int O, int b, int I) {
    const int tiles = (O + 31) / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int from = blockIdx.x % tiles * 32, first = blockIdx.x / tiles * 8;
    x += (long long)first * I, y += (long long)first * O;
    for (long long o = from + warp; o < O && o < from + 32; o += 8) {
        real sum[8] = {};
        for (int i = lane; i < I; i += 32) {
            const real entry = w[o * I + i];
            for (int row = 0; row < 8; row++)
                if (first + row < b) sum[row] += x[(long long)row * I + i] * entry;
        }
        for (int row = 0; row < 8; row++) {
            const real total = warp_reduce(sum[row], false);
            if (lane == 0 && first + row < b) y[row * (long long)O + o] = total;
        }
    }
}

// -- the losses: one block takes all tokens -------------------------------------------------------
// loss = -sum_t w_t obj_t,  obj = min(ratio A, clip(ratio, low, high) A),  ratio = exp(logp - old),
// its exponent cut at limit; or another clip (1: of a book, 2: none); dual > 0: at least dual A
// slope = ratio A, 0 where obj does not follow ratio
KERNEL ppo_clip_forward(const real* logp, const real* old_logp, const real* advantages,
    const real* weights, real* slope, bool* clipped, real* loss, long long n, int clip, double low,
    double high, double dual, double limit) {
    const real least = low, most = high, edge = limit, dual_clip = dual;
    real sum = 0;
    EACH(t, n) {
        const real A = advantages[t], l = logp[t] - old_logp[t];
        const bool too_long = l > edge || l < -edge;
        const real ratio = exp(l > edge ? edge : l < -edge ? -edge : l);
        const bool above = (clip == 1 || clip == 0 && A >= 0) && ratio > most;
        const bool below = clip == 0 && A < 0 && ratio < least;
        real obj = (above ? most : below ? least : ratio) * A;
        const bool floored = dual > 0 && A < 0 && obj < dual_clip * A;
        if (floored) obj = dual_clip * A;
        clipped[t] = too_long || above || below || floored;
        slope[t] = weights[t] > 0 && !clipped[t] ? ratio * A : (real)0;
        if (weights[t] > 0) sum += weights[t] * obj;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = -sum;
}

// loss = 1/2 sum_t w_t max((V - R)^2, (V_c - R)^2),  V_c = V_old + clip(V - V_old, -bound, bound)
// slope = V - R, 0 where V_c wins.  bound < 0: there is no V_c.
KERNEL value_loss_forward(const real* values, const real* old_values, const real* returns,
    const real* weights, real* slope, real* loss, long long n, double bound) {
    const real most = bound;
    real sum = 0;
    EACH(t, n) {
        real error = values[t] - returns[t];
        const real moved = values[t] - old_values[t], sign = moved > most ? 1 : -1;
        const real edge = old_values[t] - returns[t] + sign * most;
        const bool clipped = most >= 0 && (moved > most || moved < -most) && edge * edge > error * error;
        slope[t] = weights[t] > 0 && !clipped ? error : (real)0;
        if (clipped) error = edge;
        if (weights[t] > 0) sum += weights[t] * (error * error);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = sum / 2;
}

// -- the optimiser --------------------------------------------------------------------------------
// of_block[k] = sum of the squares of what block k takes; there are 256 blocks of 256 threads
KERNEL squares(const real* g, double* of_block, long long n) {
    double sum = 0;
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL)
        sum += (double)(g[i] * g[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) of_block[blockIdx.x] = sum;
}

// norm = |g| from its 256 sums;  g = g min(1, max_norm / (norm + 1e-6)), in place
KERNEL clip_norm(const double* of_block, real* g, double* norm, long long n, double max_norm) {
    const double length = sqrt(block_sum(of_block[threadIdx.x]));
    const double scale = max_norm / (length + 1e-6);
    if (blockIdx.x == 0 && threadIdx.x == 0) *norm = length;
    const real factor = scale > 1 ? 1 : scale;  // nan stays nan
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL)
        g[i] *= factor;
}

// One thread a parameter, and nothing at all if one of the numbers is nan or inf:
// m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
// theta = (1 - lr decay) theta - step_size m / (sqrt(v) root_scale + eps)
KERNEL move_if_finite(const double* numbers, const real* g, const real* decay, real* theta, real* m,
    real* v, long long n, int n_numbers, double lr, double beta1, double beta2, double eps,
    double step_size, double root_scale) {
    for (int k = 0; k < n_numbers; k++)
        if (!isfinite(numbers[k])) return;
    ONE_ENTRY(i, n);
    m[i] = (real)beta1 * m[i] + (real)(1 - beta1) * g[i];
    v[i] = (real)beta2 * v[i] + (real)(1 - beta2) * (g[i] * g[i]);
    const real root = sqrt(v[i]) * (real)root_scale + (real)eps;
    const real kept = decay ? 1 - (real)lr * decay[i] : (real)1;
    theta[i] = kept * theta[i] - (real)step_size * (m[i] / root);
}
