// What the views hand to each other, in memory: nothing about a sequence is stored in the browser.
export const kept = {};
