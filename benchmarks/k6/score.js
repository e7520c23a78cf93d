// Scoring under a constant arrival rate, for those who use k6:
//
//   k6 run -e BODIES=$PWD/build/bodies.jsonl -e RATE=100 -e DURATION=60s benchmarks/k6/score.js
//
// BODIES is the file that `ecdctr loadtest --requests` takes, one JSON body a line; k6 would look
// for a relative path from where this script is. One thing is different: k6 measures from the
// actual time of sending, so what a request waited for before shows up as `dropped_iterations`
// only, which must be 0 for its percentiles to be trusted.
import http from "k6/http";
import { check } from "k6";
import { SharedArray } from "k6/data";
import { Counter, Rate } from "k6/metrics";

const URL = `${__ENV.URL || "http://127.0.0.1:8000"}/v1/score`;
const RATE = Number(__ENV.RATE || 50);
const SLO_P99_MS = Number(__ENV.SLO_P99_MS || 50);

if (!__ENV.BODIES) {
  throw new Error("BODIES must be the absolute path of a file with one JSON body a line");
}
const bodies = new SharedArray("bodies", () =>
  open(__ENV.BODIES)
    .split("\n")
    .filter((line) => line.trim())
    .map((line) => ({ text: line, candidates: JSON.parse(line).candidates.id.length })),
);
const degraded = new Rate("degraded");
const answers = new Counter("answers_by_model");

export const options = {
  scenarios: {
    score: {
      executor: "constant-arrival-rate",
      rate: RATE,
      timeUnit: "1s",
      duration: __ENV.DURATION || "30s",
      preAllocatedVUs: Number(__ENV.VUS || 64),
      maxVUs: Number(__ENV.MAX_VUS || 512),
    },
  },
  thresholds: {
    http_req_duration: [`p(99)<${SLO_P99_MS}`],
    http_req_failed: ["rate==0"],
    checks: ["rate==1"],
    dropped_iterations: ["count==0"],
  },
  summaryTrendStats: ["avg", "p(50)", "p(90)", "p(99)", "p(99.9)", "max"],
};

export default function () {
  const body = bodies[Math.floor(Math.random() * bodies.length)];
  const response = http.post(URL, body.text, {
    headers: { "content-type": "application/json" },
    timeout: __ENV.TIMEOUT || "5s",
  });
  const answer = response.status === 200 ? response.json() : null;
  const complete = check(answer, {
    "one score per candidate": (a) => a !== null && a.scores.length === body.candidates,
  });
  if (complete) {
    degraded.add(answer.degraded.length > 0);
    answers.add(1, { model: answer.model });
  }
}
