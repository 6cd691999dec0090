// Objects and strings, held until it is ended: `node heap.js PROSE`. Says 'ready'.
'use strict';

const fs = require('node:fs');

const ORDERS = 150_000;
const SENTENCES = 150_000;

/** The same numbers at every run (mulberry32), from 0 to below 1. */
function generator(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

const random = generator(1);
const below = (limit) => Math.floor(random() * limit);
const prose = fs.readFileSync(process.argv[2], 'utf8');

/** A copy and no reference into `prose`. */
function cut(length) {
  const at = below(prose.length - length);
  return Buffer.from(prose.slice(at, at + length)).toString();
}

function order(number) {
  const lines = Array.from({ length: 1 + below(6) }, () => ({ article: below(20_000), count: 1 + below(5), price: below(1e5) / 100 }));
  return {
    id: `${number.toString(16)}-${below(2 ** 32).toString(16)}${below(2 ** 32).toString(16)}`,
    customer: `customer-${below(20_000)}`,
    placed: new Date(1.7e12 + below(1e10)),
    lines,
    remark: random() < 0.25 ? cut(10 + below(80)) : null,
  };
}

const orders = new Map();
const byCustomer = {};
for (let number = 0; number < ORDERS; number += 1) {
  const one = order(number);
  orders.set(one.id, one);
  (byCustomer[one.customer] ??= []).push(one);
}

const sentences = Array.from({ length: SENTENCES }, () => cut(20 + below(200)));
const counts = new Map();
for (const sentence of sentences) {
  for (const word of sentence.split(/\W+/)) counts.set(word, (counts.get(word) ?? 0) + 1);
}
// What came as JSON, as a server has it.
const parsed = JSON.parse(JSON.stringify([...orders.values()].slice(0, 30_000)));
const bodies = sentences.slice(0, 20_000).map((sentence) => Buffer.from(sentence));

console.log('ready');
setTimeout(() => console.log(orders.size, Object.keys(byCustomer).length, counts.size, parsed.length, bodies.length), 3_600_000);
