// Queues mails for the BullMQ peer: `node fill.js N`, to m0@example.com, m1@example.com, and so on.
"use strict";

const { Queue } = require("bullmq");

async function fill(mails) {
  const queue = new Queue("email", { connection: { url: process.env.REDIS_URL } });
  for (let number = 0; number < mails; number++) {
    await queue.add("welcome", { name: "Ada", email: `m${number}@example.com` });
  }
  await queue.close();
}

fill(Number(process.argv[2]));
