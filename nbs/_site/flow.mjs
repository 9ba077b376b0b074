// A small residual network in the plane and its training, with derivatives by hand:
// x[k+1] = x[k] + v_k(x[k]), v_k(x) = W2 relu(W1 x + b1) + b2, logits = W x[K] + b.
// The numbers are those of the package's dense_net(2, 2) and LeastAction, and of torch.optim.Adam; tests/test_explorable.py compares.

export const HIDDEN = 16

// Random numbers from a seed, the same everywhere (mulberry32), in [0, 1).
export function generator(seed) {
  let state = seed >>> 0
  return () => {
    state = state + 0x6d2b79f5 | 0
    let t = Math.imul(state ^ state >>> 15, 1 | state)
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32
  }
}

const normal = random => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())


// Data: points [n x 2] and labels [n], the two classes in turn

const turn = (radius, angle) => [radius * Math.cos(angle), radius * Math.sin(angle)]

export const SHAPES = {
  circles: {noise: .07, place: (label, u) => turn(label ? .5 : 1, 2 * Math.PI * u)},
  moons: {noise: .07, place(label, u) {
    const [x, y] = turn(.8, Math.PI * u)
    return label ? [.4 - x, .2 - y] : [x - .4, y - .2]
  }},
  spirals: {noise: .03, place: (label, u) => turn(.2 + .9 * u, 2.5 * Math.PI * u + Math.PI * label)},
}

export function sample(name, n, random) {
  const points = new Float64Array(2 * n), labels = new Uint8Array(n), {noise, place} = SHAPES[name]
  for (let i = 0; i < n; i++) {
    const [x, y] = place(labels[i] = i % 2, random())
    points.set([x + noise * normal(random), y + noise * normal(random)], 2 * i)
  }
  return {points, labels}
}


// The network. Its weights lie in one array, as PyTorch lists them: W1 [hidden x 2], b1, W2 [2 x hidden], b2 of each block,
// then W [2 x 2], b.

const blockSize = hidden => 5 * hidden + 2

export class Network {
  constructor(blocks, hidden = HIDDEN, weights = new Float64Array(blocks * blockSize(hidden) + 6)) {
    Object.assign(this, {blocks, hidden, weights})
  }

  // PyTorch's default, uniform within one over the root of the number of inputs; in the blocks times a gain.
  static random(blocks, random, gain = 1, hidden = HIDDEN) {
    const net = new Network(blocks, hidden), size = blockSize(hidden), head = blocks * size
    net.weights.forEach((_, i) => {
      const inputs = i >= head || i % size < 3 * hidden ? 2 : hidden
      net.weights[i] = (i < head ? gain : 1) * (2 * random() - 1) / Math.sqrt(inputs)
    })
    return net
  }

  copy() { return new Network(this.blocks, this.hidden, this.weights.slice()) }

  // Positions of n points at all layers, [(blocks + 1) x n x 2]; what the hidden units give is kept in `active`,
  // [blocks x n x hidden], if there is one.
  trajectory(points, x = new Float64Array((this.blocks + 1) * points.length), active) {
    const {blocks, hidden, weights: w} = this, n = points.length / 2
    x.set(points)
    for (let k = 0, unit = 0, from = 0; k < blocks; k++) {
      const W1 = k * blockSize(hidden), b1 = W1 + 2 * hidden, W2 = b1 + hidden, b2 = W2 + 2 * hidden
      for (let i = 0; i < n; i++, from += 2) {
        const a = x[from], b = x[from + 1]
        let v0 = w[b2], v1 = w[b2 + 1]
        for (let j = 0; j < hidden; j++, unit++) {
          const u = Math.max(0, w[W1 + 2 * j] * a + w[W1 + 2 * j + 1] * b + w[b1 + j])
          if (active) active[unit] = u
          v0 += w[W2 + j] * u
          v1 += w[W2 + hidden + j] * u
        }
        x[from + 2 * n] = a + v0
        x[from + 2 * n + 1] = b + v1
      }
    }
    return x
  }

  // How far the last layer prefers class 1 at a point: the classes are parted where this is zero, on a straight line.
  margin(a, b) {
    const w = this.weights, W = this.blocks * blockSize(this.hidden)
    return (w[W + 2] - w[W]) * a + (w[W + 3] - w[W + 1]) * b + w[W + 5] - w[W + 4]
  }
}


// Training: all samples in each step, by Adam. The objective is the loss plus the action over lambda, and lambda rises by tau
// times what the loss is above its target, before each step; plain training has lambda = Infinity.

const BETA1 = .9, BETA2 = .999, EPSILON = 1e-8, LOWEST = 1e-3

export class Training {
  constructor(net, {points, labels}, {rate = .01, lambda = Infinity, tau = 1, target = 0} = {}) {
    const n = labels.length, size = net.weights.length
    Object.assign(this, {net, points, labels, rate, lambda, tau, target, steps: 0, loss: NaN, action: NaN})
    this.x = new Float64Array((net.blocks + 1) * 2 * n)
    this.active = new Float64Array(net.blocks * n * net.hidden)
    this.pull = new Float64Array(2 * n)       // derivative of the objective by a position
    this.gradient = new Float64Array(size)
    this.mean = new Float64Array(size)        // Adam's two moments
    this.square = new Float64Array(size)
  }

  step() {
    this.net.trajectory(this.points, this.x, this.active)
    this.gradient.fill(0)
    this.head()
    this.action = total(energies(this.x, this.net.blocks))
    this.lambda = Math.max(Math.min(LOWEST, this.lambda), this.lambda + this.tau * (this.loss - this.target))
    for (let k = this.net.blocks - 1; k >= 0; k--) this.block(k)
    this.adam()
    return this
  }

  // Mean cross-entropy, and its derivatives by the last layer's weights and by the end positions.
  head() {
    const {net, labels, x, pull, gradient: g} = this, w = net.weights, n = labels.length
    const W = net.blocks * blockSize(net.hidden), end = net.blocks * 2 * n
    this.loss = 0
    for (let i = 0; i < n; i++) {
      const a = x[end + 2 * i], b = x[end + 2 * i + 1], margin = net.margin(a, b), wrong = labels[i] ? -margin : margin
      this.loss += (Math.max(0, wrong) + Math.log1p(Math.exp(-Math.abs(wrong)))) / n
      const d = (1 / (1 + Math.exp(-margin)) - labels[i]) / n   // by the logit of class 1; by that of class 0 it is -d
      g[W] -= d * a; g[W + 1] -= d * b; g[W + 2] += d * a; g[W + 3] += d * b; g[W + 4] -= d; g[W + 5] += d
      pull[2 * i] = d * (w[W + 2] - w[W])
      pull[2 * i + 1] = d * (w[W + 3] - w[W + 1])
    }
  }

  // Back through block k: derivatives by its weights; `pull` goes from the positions after it to those before it.
  block(k) {
    const {net: {hidden, weights: w}, x, active, pull, gradient: g, labels: {length: n}} = this, price = 1 / (n * this.lambda)
    const W1 = k * blockSize(hidden), b1 = W1 + 2 * hidden, W2 = b1 + hidden, b2 = W2 + 2 * hidden
    for (let i = 0, at = k * 2 * n, unit = k * n * hidden; i < n; i++, at += 2) {
      const a = x[at], b = x[at + 1]
      const p0 = pull[2 * i] + price * (x[at + 2 * n] - a)   // derivatives by the velocity
      const p1 = pull[2 * i + 1] + price * (x[at + 2 * n + 1] - b)
      g[b2] += p0
      g[b2 + 1] += p1
      let back0 = 0, back1 = 0
      for (let j = 0; j < hidden; j++, unit++) {
        const u = active[unit]
        if (u <= 0) continue
        const d = w[W2 + j] * p0 + w[W2 + hidden + j] * p1
        g[W2 + j] += p0 * u
        g[W2 + hidden + j] += p1 * u
        g[W1 + 2 * j] += d * a
        g[W1 + 2 * j + 1] += d * b
        g[b1 + j] += d
        back0 += d * w[W1 + 2 * j]
        back1 += d * w[W1 + 2 * j + 1]
      }
      pull[2 * i] += back0
      pull[2 * i + 1] += back1
    }
  }

  adam() {
    const {net: {weights: w}, gradient: g, mean, square, rate} = this
    this.steps++
    const size = rate / (1 - BETA1 ** this.steps), scale = Math.sqrt(1 - BETA2 ** this.steps)
    for (let i = 0; i < w.length; i++) {
      mean[i] += (1 - BETA1) * (g[i] - mean[i])
      square[i] = BETA2 * square[i] + (1 - BETA2) * g[i] * g[i]
      w[i] -= size * mean[i] / (Math.sqrt(square[i]) / scale + EPSILON)
    }
  }
}


// Measures of a trajectory x [(blocks + 1) x n x 2]; means over the samples, and over the two features of squared lengths

// Energy of each block: the action by parts.
export function energies(x, blocks) {
  const size = x.length / (blocks + 1), energy = new Float64Array(blocks)
  for (let i = size; i < x.length; i++) energy[Math.floor(i / size) - 1] += (x[i] - x[i - size]) ** 2 / size
  return energy
}

// Distance from start to end over the length of the way; 1 for a point that rests.
export function straightness(x, blocks) {
  const n = x.length / (2 * (blocks + 1))
  const way = (i, from, to) => Math.hypot(...[0, 1].map(d => x[2 * (to * n + i) + d] - x[2 * (from * n + i) + d]))
  let sum = 0
  for (let i = 0; i < n; i++) {
    let length = 0
    for (let k = 0; k < blocks; k++) length += way(i, k, k + 1)
    sum += length ? way(i, 0, blocks) / length : 1
  }
  return sum / n
}

// Share of points that the straight cut puts on the right side.
function accuracy(net, x, labels) {
  const end = net.blocks * 2 * labels.length
  const right = (label, i) => net.margin(x[end + 2 * i], x[end + 2 * i + 1]) > 0 === label > 0
  return labels.reduce((sum, label, i) => sum + right(label, i), 0) / labels.length
}

// K times the sum of squared steps, in three parts: what the cheapest way of bringing the points to the same places costs, what
// is lost because points end at each other's places, and what because ways are not straight and even.
export function split(x, blocks) {
  const n = x.length / (2 * (blocks + 1)), start = x.subarray(0, 2 * n), end = x.subarray(2 * n * blocks)
  const cost = squares(start, end)
  const partner = matching(cost, n), all = blocks * total(energies(x, blocks))
  let chord = 0, transport = 0
  for (let i = 0; i < n; i++) {
    chord += cost[i * n + i] / (2 * n)
    transport += cost[i * n + partner[i]] / (2 * n)
  }
  return {total: all, transport, assignment: chord - transport, path: all - chord, partner}
}

function squares(start, end) {
  const n = start.length / 2, cost = new Float64Array(n * n)
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      cost[i * n + j] = (end[2 * j] - start[2 * i]) ** 2 + (end[2 * j + 1] - start[2 * i + 1]) ** 2
    }
  }
  return cost
}

// The cheapest one-to-one matching, exact: the partner of each row of cost [n x n]. Shortest augmenting paths with prices
// (Jonker and Volgenant 1987): rows join one by one, each along the path on which the matching stays cheapest.
export function matching(cost, n) {
  const FREE = n, row = new Int32Array(n + 1).fill(-1), before = new Int32Array(n + 1)
  const rowPrice = new Float64Array(n), price = new Float64Array(n + 1)
  for (let i = 0; i < n; i++) {
    const least = new Float64Array(n).fill(Infinity), done = new Uint8Array(n + 1)
    let at = FREE
    row[FREE] = i
    while (row[at] >= 0) {
      done[at] = 1
      const r = row[at]
      let nearest = -1
      for (let j = 0; j < n; j++) {
        if (done[j]) continue
        const reduced = cost[r * n + j] - rowPrice[r] - price[j]
        if (reduced < least[j]) { least[j] = reduced; before[j] = at }
        if (nearest < 0 || least[j] < least[nearest]) nearest = j
      }
      const shift = least[nearest]
      for (let j = 0; j <= n; j++) {
        if (done[j]) { rowPrice[row[j]] += shift; price[j] -= shift }
        else if (j < n) least[j] -= shift
      }
      at = nearest
    }
    for (; at !== FREE; at = before[at]) row[at] = row[before[at]]
  }
  const partner = new Int32Array(n)
  for (let j = 0; j < n; j++) partner[row[j]] = j
  return partner
}


// Two networks from the same weights, plain and least action

export const START = {data: 'circles', blocks: 9, gain: .5, seed: 2, lambda: .1, tau: .1}
const RATE = .001, TARGET = .05, SAMPLES = [128, 64, 400]   // to train on, to show, to judge accuracy by

export class Pair {
  constructor({own, ...settings} = {}) {   // own: points and labels that take the place of drawn ones
    const {data, blocks, gain, seed, lambda, tau} = {...START, ...settings}, random = generator(seed)
    const [train, shown, judged] = SAMPLES.map(n => own ?? sample(data, n, random))
    const net = Network.random(blocks, random, gain)
    this.blocks = blocks
    this.sides = [{}, {lambda, tau}].map((price, i) => {
      const training = new Training(i ? net.copy() : net, train, {rate: RATE, target: TARGET, ...price})
      return {...shown, net: training.net, training, target: TARGET, judged, curve: {loss: [], price: []}}
    })
  }

  get steps() { return this.sides[1].training.steps }

  // One step of both; the plain network rests once its loss has reached the target: nothing asks it for more.
  step() {
    for (const [i, {training, curve}] of this.sides.entries()) {
      if (i || !(training.loss <= TARGET)) training.step()
      curve.loss.push(training.loss)
      if (i) curve.price.push(1 / training.lambda)
    }
  }

  // Where the points shown are now, and what that costs; with the cheapest matching, or without.
  measure(matched = false) {
    for (const side of this.sides) {
      side.x = side.net.trajectory(side.points)
      side.energy = energies(side.x, this.blocks)
      side.split = matched ? split(side.x, this.blocks) : null
    }
    return this
  }

  // Numbers of a side in words.
  told({net, x, energy, judged}) {
    const right = accuracy(net, net.trajectory(judged.points), judged.labels)
    return {energy: short(total(energy)), straightness: short(straightness(x, this.blocks)),
            accuracy: `${Math.round(100 * right)} %`}
  }
}

export const total = values => values.reduce((sum, value) => sum + value, 0)

// Three digits, hardly more.
export function short(value) {
  if (value >= 100) return value.toFixed(0)
  return value >= .995 ? value.toPrecision(3) : value.toFixed(value < .0995 ? 3 : 2)
}
